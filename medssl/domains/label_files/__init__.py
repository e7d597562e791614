"""Label maps in the forms in which clinics and tools keep them, each read onto the grid of its image.

They stand in `domains` because this is where patient coordinates (LPS) become canonical axes (RAS), and nowhere else.
"""
