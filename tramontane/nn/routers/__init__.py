"""The routers of the literature, one short file per family, all behind the seam of nn/router.py."""
