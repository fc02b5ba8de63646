"""This room uses a model with its weights: how likely is a text, and which text comes next?"""
