"""A picture to the states that the text model looks at."""
