"""imglish: an image is a foreign language. The vision-language pre-training family in one code base."""

__version__ = "0.1.0"
