"""Constants of the counter-based noise, shared by :mod:`.sampling` in torch and by its Triton kernel."""

from __future__ import annotations

# Odd multipliers of published mixers, as the signed integers that torch wants: splitmix64's for the 64-bit row key,
# MurmurHash3's 32-bit finaliser for each token. Integer tensors wrap around on overflow, as these mixers need.
GOLDEN_64 = 0x9E3779B97F4A7C15 - (1 << 64)
SPLITMIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
SPLITMIX_2 = 0x94D049BB133111EB - (1 << 64)
GOLDEN_32 = 0x9E3779B1 - (1 << 32)
MURMUR_1 = 0x85EBCA6B - (1 << 32)
MURMUR_2 = 0xC2B2AE35 - (1 << 32)
BITS = 31  # of the token hash that become the uniform variate
LARGEST_BELOW_ONE = 1.0 - 2.0**-24  # in float32
