"""From text files and hub data to blocks of tokens."""
