"""A vision-language model that exits its image encoder early. Knows nothing of prompts or answers."""
