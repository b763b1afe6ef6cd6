"""What a comparison looks like: statistics, plots, pictures of tokens, one HTML file."""
