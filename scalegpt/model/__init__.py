"""This room is the GPT as functions of arrays with named axes; it knows no mesh and no file."""
