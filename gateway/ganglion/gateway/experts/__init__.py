"""Edge experts: whole models that answer side by side. The prompt decides whom to ask, here, where the text is."""
