"""What an owner does with an index: split, label, compare, withdraw, release."""
