"""Looking ahead: steps, memory, bytes, and what is missing here."""
