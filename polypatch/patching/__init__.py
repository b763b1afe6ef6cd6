"""How a raw signal is cut into tokens; one file a paper."""
