"""Reports for people: numbers, tables, figures, the card, the page, the terminal."""
