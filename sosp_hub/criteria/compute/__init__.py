"""What criteria compute with. Criteria import it when they score, so that naming them is cheap."""
