"""Find files and read their headers: listing, one file, many files over workers or a cluster."""
