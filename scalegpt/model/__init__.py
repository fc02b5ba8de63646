"""The GPT as functions of arrays with named axes. It knows no mesh and no file."""
