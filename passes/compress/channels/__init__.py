"""Channels that hang together, and passes that remove them."""
