"""``python -m polypatch``, so that ``accelerate launch -m polypatch train`` works."""

from .cli import main

if __name__ == "__main__":
    main()
