"""What `ganglion bench` measures a deployment with, on the user's own path: HTTP in, tokens out.

`bench/` uses the same parts for comparisons that only a contributor makes.
"""
