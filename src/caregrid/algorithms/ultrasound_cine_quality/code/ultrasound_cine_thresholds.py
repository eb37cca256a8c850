"""From which figure on a cine is called faulty. Chosen by ``evaluation/evaluate.py --tune`` on the tuning clips alone."""

#: Longest unchanged run, as a share of the cine.
STILL_SHARE = 0.275
#: 90th percentile of brightness inside the sector, 0..1.
DARK_LEVEL = 0.227
#: Share of the sector that is saturated.
BRIGHT_SHARE = 0.012
#: One minus blur, 0..1.
SHARP_LEVEL = 0.455
