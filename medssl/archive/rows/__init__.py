"""From the headers of files to rows of the index, in its closed vocabularies."""
