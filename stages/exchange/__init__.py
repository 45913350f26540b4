"""What travels: as folders, or as one file to mail or carry."""
