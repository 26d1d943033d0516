"""What `against_peers.py` consists of."""
