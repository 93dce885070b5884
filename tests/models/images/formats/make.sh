#!/bin/sh
# Files of further formats, written by other programs, and beside each what ImageMagick makes of it (NAME.png).
# Usage: make.sh EMPTY_FOLDER SRGB.icc. Ran on Debian 12 with the packages imagemagick (6.9.11), ffmpeg (5.1), libavif-bin
# (0.11.1), libheif-examples (1.15.1) and libjxl-tools (0.7.0); SRGB.icc was LittleCMS's own profile:
#   python -c "from PIL import ImageCms as c; open('SRGB.icc', 'wb').write(c.ImageCmsProfile(c.createProfile('sRGB')).tobytes())"
# Other versions write other bytes; both sides of a comparison are always made together.
set -eu
im=/usr/bin/convert
mkdir -p "$1" && cd "$1"
srgb=$2
quiet="-hide_banner -loglevel error -y"

# Six patches of 8 x 8 pixels; the same with a half-clear patch; mirrored; as a JPEG, and as one that EXIF turns.
awk 'BEGIN {
  print "P3 24 16 255"
  split("200 60 40,60 160 70,50 80 190,225 185 150,40 44 50,240 238 230", patch, ",")
  for (y = 0; y < 16; y++) for (x = 0; x < 24; x++) print patch[int(y / 8) * 3 + int(x / 8) + 1]
}' > text.ppm
$im text.ppm src.ppm
$im src.ppm PNG24:src.png
$im src.png -alpha set -region 8x8+16+0 -channel A -evaluate set 50% +region PNG32:alpha.png
$im src.png -flop PNG24:other.png
$im src.png -quality 95 -sampling-factor 1x1 src.jpg
printf 'Exif\0\0MM\0*\0\0\0\010\0\001\001\022\0\003\0\0\0\001\0\006\0\0\0\0\0\0' > turned.exif
{ head -c 2 src.jpg; printf '\377\341\0\042'; cat turned.exif; tail -c +3 src.jpg; } > turned.jpg

# Profiles of Display P3 and BT.2020, as libjxl makes them.
for space in P3:RGB_D65_DCI_Rel_SRG 2020:RGB_D65_202_Rel_SRG; do
  cjxl src.ppm wide.jxl -d 0 -x color_space="${space#*:}" 2> err.txt
  djxl wide.jxl wide.png 2> err.txt
  $im wide.png "${space%%:*}.icc"
done
p3=P3.icc bt2020=2020.icc

# GIF
$im src.png still.gif
$im -delay 10 src.png other.png -loop 0 animated.gif
$im -dispose background \( src.png -crop 16x8+0+8 -repage 24x16+8+0 \) other.png offset.gif
$im -dispose previous alpha.png src.png clear.gif
ffmpeg $quiet -loop 1 -i src.png -frames:v 3 ffmpeg.gif

# BMP
$im src.png -type TrueColor BMP3:24bit.bmp
$im src.png -type Palette BMP3:palette.bmp
$im src.png -type Palette -compress RLE BMP3:rle.bmp
$im alpha.png alpha.bmp
ffmpeg $quiet -i src.png -pix_fmt bgr565le ffmpeg-565.bmp

# TIFF
$im src.png -compress lzw lzw.tiff
$im src.png -depth 16 -compress zip 16bit.tiff
$im src.png -define tiff:endian=msb -compress rle big-endian.tiff
$im src.png -define tiff:tile-geometry=16x16 -compress zip tiled.tiff
$im alpha.png -compress none alpha.tif
$im src.png -colorspace CMYK -compress zip cmyk.tiff
$im src.png -colorspace gray -threshold 50% -type bilevel -compress group4 fax.tiff
$im src.png -interlace plane -compress none planes.tiff
$im src.png other.png -compress zip pages.tiff
$im src.png -compress zip TIFF64:bigtiff.tiff
$im src.png -orient RightTop -compress zip turned.tiff
$im src.png -orient LeftBottom -compress none mirrored.tiff
$im src.png -profile $p3 -compress zip p3.tiff
$im src.jpg -compress jpeg -quality 95 -sampling-factor 1x1 jpeg.tiff
ffmpeg $quiet -i src.png -compression_algo packbits ffmpeg.tiff

# AVIF: by libavif and by ffmpeg
avif="avifenc -s 6 -y 444 --min 6 --max 6"
$avif src.png plain.avif > /dev/null
$avif -l src.png lossless.avif > /dev/null
$avif -d 10 src.png 10bit.avif > /dev/null
$avif alpha.png alpha.avif > /dev/null
for turn in 1 2 3; do $avif --irot $turn src.png turned-$turn.avif > /dev/null; done
$avif --imir 1 src.png mirrored.avif > /dev/null
$avif --irot 1 --imir 0 src.png turned-mirrored.avif > /dev/null
$avif --icc $p3 src.png p3-icc.avif > /dev/null
$avif --icc $bt2020 src.png bt2020-icc.avif > /dev/null
$avif --cicp 12/13/6 src.png p3-cicp.avif > /dev/null
$avif --cicp 9/13/9 src.png bt2020-cicp.avif > /dev/null
$avif -y 420 src.png 420.avif > /dev/null
ffmpeg $quiet -i src.png -c:v libaom-av1 -still-picture 1 -crf 6 -pix_fmt yuv444p ffmpeg.avif
ffmpeg $quiet -loop 1 -i src.png -frames:v 3 -c:v libaom-av1 -crf 6 -pix_fmt yuv444p sequence.avif

# HEIC
heif-enc -q 95 -p chroma=444 -o plain.heic src.png > /dev/null
heif-enc -q 95 -p chroma=444 -o from-turned.heic turned.jpg > /dev/null
heif-enc -q 95 -o 420.heic src.png > /dev/null
heif-enc -q 95 -p chroma=444 -o two.heic src.png other.png > /dev/null
$im src.png -profile $p3 PNG24:p3.png
heif-enc -q 95 -p chroma=444 -o p3-icc.heic p3.png > /dev/null

# JPEG XL
cjxl src.png lossless.jxl -d 0 2> err.txt
cjxl src.png lossy.jxl -d 0.5 2> err.txt
cjxl alpha.png alpha.jxl -d 0 2> err.txt
cjxl src.ppm p3.jxl -d 0 -x color_space=RGB_D65_DCI_Rel_SRG 2> err.txt
cjxl src.ppm bt2020-container.jxl -d 0 --container=1 -x color_space=RGB_D65_202_Rel_SRG 2> err.txt
cjxl src.jpg recompressed.jxl 2> err.txt
cjxl turned.jpg turned-recompressed.jxl 2> err.txt
cjxl turned.jpg turned.jxl -j 0 -d 0.5 2> err.txt

# JPEG 2000, ICO
$im src.png -define jp2:rate=1 plain.jp2
$im src.png plain.ico

# What each shows: the first frame on its canvas, upright, in sRGB, over white. ImageMagick reads AVIF and HEIF as
# YCbCr, loses their profiles by the way and heeds none of their code
# points, so these are given to it; and in this version reads no JPEG XL.
rm -f wide.* P3.icc.tmp
for file in *.gif *.bmp *.tif *.tiff *.avif *.heic *.jxl *.jp2 *.ico; do
  from="$file[0]" assigned="-colorspace sRGB"
  case $file in
    *.jxl) djxl "$file" decoded.png 2> err.txt; from=decoded.png ;;
    alpha.avif) avifdec "$file" decoded.png > /dev/null; from=decoded.png ;; # whose alpha this version does not read
    p3-*.avif | p3-*.heic) assigned="$assigned +profile * -profile $p3" ;;
    bt2020-*.avif) assigned="$assigned +profile * -profile $bt2020" ;;
  esac
  set -f
  $im "$from" -auto-orient $assigned -intent relative -black-point-compensation -profile "$srgb" \
    -background white -flatten -strip -depth 8 -define png:exclude-chunks=date,time "PNG24:${file%.*}.${file##*.}.png"
  set +f
done
rm -f decoded.png err.txt text.ppm turned.exif turned.jpg src.* alpha.png other.png p3.png ./*.icc
