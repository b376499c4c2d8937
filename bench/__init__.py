"""Models, peers and the protocol with which Paring is timed and checked against them."""
