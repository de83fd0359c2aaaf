"""Probable causes of broken laws."""
