"""From which figure on an X-ray is called faulty. Chosen by ``evaluation/evaluate.py --tune`` on source A alone."""

#: Share of the middle of the picture at the highest, and at the lowest, grey value.
CLIPPED_BRIGHT_SHARE = 0.075
CLIPPED_DARK_SHARE = 0.003
#: Spread of the middle half of the grey values, of the whole range.
FLAT_CONTRAST = 0.157
