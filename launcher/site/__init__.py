"""A cluster profile made by looking (`ask`, `draft`), and proved by a short job (`trial`, `job`, `probe`, `judge`)."""
