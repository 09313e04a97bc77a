"""A few lines of each kind of text: stories, accents, code, characters of many bytes."""

TEXTS = [
    "Once upon a time there was a little girl who didn't like the rain. " * 3,
    "L'\u00e9t\u00e9 de l'ann\u00e9e derni\u00e8re, le gar\u00e7on \u00e9tait tr\u00e8s content.",
    "def add(x, y):\n    if x > 10:\n        return x + y\n\n    return 12345\n",
    "\u65e5\u672c\u8a9e \U0001f600 \U0001f468\u200d\U0001f4bb done. The end, said the little girl.",
]
