"""The tiny family: small trained models of real architectures, and the rendered world whose truth they describe."""
