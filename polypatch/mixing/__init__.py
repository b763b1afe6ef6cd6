"""How tokens talk to each other: attention and its rivals; one file a method."""
