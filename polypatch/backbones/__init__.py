"""Complete encoders; one file a paper."""
