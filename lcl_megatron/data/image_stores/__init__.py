"""Where the images of a data set lie: folders and tars, read by name or URL."""
