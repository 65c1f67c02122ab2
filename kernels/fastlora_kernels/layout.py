"""Numbers that kernels, plans and ops have to agree on. Needs no Triton."""

# elements whose keep bits share one int32 of the packed dropout mask
MASK_WORD_BITS = 32
# row tiles that walk the columns together, so that what they share stays in L2
TILES_PER_GROUP = 8
