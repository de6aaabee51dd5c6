// How the device holds the weight of a layer, as DVDQUANT_WEIGHTS says.
#pragma once

#include <string>

namespace dvdquant::plugin {

// Packed: the bound codes, and the group scales and byte zero-points of groups, are the only copy, and what is made of them are their
// rows, the same for all widths (dvdq_make_rows). Expanded: as the path multiplies it (dvdq_prepare_weight), where that is not
// what is bound.
enum class Form { kPacked, kExpanded };

// Remembers that a node of this layer was created. An engine creates all of its nodes before a context asks for their forms.
void remember_layer(std::string const& layer);

// $DVDQUANT_WEIGHTS for a layer: packed (also where it is unset, or auto), expanded, or mixed:NAME,NAME,… with the names of the
// layers that are expanded. Warns, once a name, of those that no node in this process has. Throws Failure on another word.
Form wanted_form(std::string const& layer);

}  // namespace dvdquant::plugin
