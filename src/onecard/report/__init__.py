"""What a search found, shown to people: one HTML file, one terminal table, one sentence."""
