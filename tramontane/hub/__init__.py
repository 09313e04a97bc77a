"""Models from elsewhere: fetched from a hub, found in its cache, checked byte by byte.

Nothing here needs torch or opens a weight file for more than its bytes.
"""
