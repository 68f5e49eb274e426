"""Whom the shared gradient is measured against: autograd's own summing, under the names that its results show."""

FLOOR = "autograd"
LABELS = {FLOOR: "autograd's own sums", "lotr_ext": "lotr_ext, layers by hand", "lotr_ext-scope": "lotr_ext, in a model"}
