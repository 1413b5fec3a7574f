"""Messages to tokens and tokens to text. No model runs here."""
