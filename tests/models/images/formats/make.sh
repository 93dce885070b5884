#!/bin/sh
# The files of this folder, written by other programs, and what ImageMagick makes of each (NAME.expected.png).
# Run in an empty folder, on Debian 13 with: imagemagick ffmpeg libavif-bin libheif-examples libjxl-tools icc-profiles-free
# The files are not the same with other versions of these programs; both sides of a comparison are made together.
set -eu
SRGB=/usr/share/color/icc/sRGB.icc
IM=${IM:-convert}
