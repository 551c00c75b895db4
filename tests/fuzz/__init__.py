"""Arbitrary bytes against both ends of the protocol; links between workers are trusted."""
