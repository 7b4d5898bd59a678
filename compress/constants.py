"""Names that are written into files, and read back by parts that mustn't import each other."""

QUANT_METHOD = "moe_compress"
# The newest that this package reads; what is written is the first that knows all that is there (export/write.py).
FORMAT_VERSION = 3

# What servers read, and what its own field `quant_method` calls it.
COMPRESSED_TENSORS = "compressed-tensors"
GPTQ = "gptq"

# llama.cpp's format, and the file of that format in a result's folder.
GGUF = "gguf"
GGUF_FILE = "model.gguf"
