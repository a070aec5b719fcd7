"""Publishing: figures, card, static page, push, verification."""
