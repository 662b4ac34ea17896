"""Which device each part of a network lies on, where they are several."""
