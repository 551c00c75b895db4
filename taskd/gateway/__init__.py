"""
The way from the browser: WebSocket and HTTP in front of a daemon, and a page to look at.

``tap`` is ``twistd taskd-gateway``; ``supervisor`` keeps its processes; ``process`` is
one of them. Needs the extra ``taskd[web]``; the daemon imports nothing from here.
"""
