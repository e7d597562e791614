"""Data cards: what a data set is, where it is from, what one may do with it, and how many of what it holds."""
