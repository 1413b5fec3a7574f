"""An image to the states that the text model looks at."""
