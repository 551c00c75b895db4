"""Tests of the whole daemon: a real twistd, real workers, real sockets."""
