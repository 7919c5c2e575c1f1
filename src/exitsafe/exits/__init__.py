"""A vision-language model that exits its image encoder early."""
