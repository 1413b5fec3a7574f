"""What `mllama chat` is made of: the conversation, the lines that people type, images on the terminal."""
