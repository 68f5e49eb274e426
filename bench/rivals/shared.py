"""The rivals of the shared gradient: autograd's own summing, under the names in the results."""

FLOOR = "autograd"
LABELS = {FLOOR: "autograd's own sums", "lotr_ext": "lotr_ext, layers by hand", "lotr_ext-scope": "lotr_ext, in a model"}
