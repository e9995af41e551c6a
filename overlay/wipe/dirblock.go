package wipe

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"sort"
)

// Directory blocks of ext4, as Documentation/filesystems/ext4/directory.rst has them.

var le = binary.LittleEndian

// errLayout: blocks are not what a directory of ext4 consists of.
var errLayout = errors.New("not the blocks of a directory")

// gap is room in a block behind the name of an entry.
type gap struct {
	at    int // of the room
	spare int // bytes
}

// recLen is the room that an entry takes.
func recLen(name int) int { return (8 + name + 3) &^ 3 }

// gaps are those of a block of entries, in the order in which the kernel looks for room
// (ext4_find_dest_de); live says whether bytes [from,to) lie in the name of an entry.
func gaps(b []byte) (list []gap, live func(from, to int) bool, err error) {
	type span struct{ from, to int }
	var names []span
	for at := 0; at < len(b); {
		if len(b)-at < 8 {
			return nil, nil, errLayout
		}
		inode, size, name := le.Uint32(b[at:]), int(le.Uint16(b[at+4:])), int(b[at+6])
		if size == 0 || size == 0xffff { // of a block of 64 KiB
			size = 1 << 16
		}
		if size < 8 || size%4 != 0 || at+size > len(b) || inode != 0 && recLen(name) > size {
			return nil, nil, errLayout
		}
		used := 0
		if inode != 0 {
			used = recLen(name)
			names = append(names, span{at + 8, at + 8 + name})
		}
		if tail := inode == 0 && size == 12 && at+size == len(b) && b[at+7] == 0xde; !tail { // its checksum
			list = append(list, gap{at + used, size - used})
		}
		at += size
	}
	return list, func(from, to int) bool {
		i := sort.Search(len(names), func(i int) bool { return names[i].to >= to })
		return i < len(names) && names[i].from <= from
	}, nil
}

// leaf is a block of entries and the least hash of a name in it.
type leaf struct {
	from  uint32
	block uint32 // of the directory
}

const halfMD4 = 1 // the hash that mke2fs sets

// leaves reads the tree of an indexed directory, ascending by hash. block reads one.
func leaves(block func(n uint32) ([]byte, error)) ([]leaf, error) {
	root, err := block(0)
	if err != nil {
		return nil, err
	}
	if len(root) < 64 || le.Uint32(root[0x18:]) != 0 || root[0x1c] != halfMD4 || root[0x1d] != 8 || root[0x1e] > 3 {
		return nil, errLayout
	}
	level := []leaf{}
	if level, err = index(root[0x20:], 0, level); err != nil {
		return nil, err
	}
	for range root[0x1e] {
		var below []leaf
		for _, l := range level {
			b, err := block(l.block)
			if err != nil {
				return nil, err
			}
			if below, err = index(b[8:], l.from, below); err != nil {
				return nil, err
			}
		}
		level = below
	}
	return level, nil
}

// index reads the entries of one block of the tree.
func index(b []byte, from uint32, to []leaf) ([]leaf, error) {
	if len(b) < 8 {
		return nil, errLayout
	}
	n := int(le.Uint16(b[2:]))
	if n == 0 || n*8 > len(b) {
		return nil, errLayout
	}
	for i := range n {
		if i > 0 { // the first has its count in place of a hash
			from = le.Uint32(b[8*i:])
		}
		to = append(to, leaf{from, le.Uint32(b[8*i+4:]) & 0x0fffffff})
	}
	return to, nil
}

// leafOf is the index of the leaf where a name with that hash gets its entry.
func leafOf(l []leaf, hash uint32) int {
	return max(0, sort.Search(len(l), func(i int) bool { return l[i].from > hash })-1)
}

// nameHash is the hash of an ASCII name: half of MD4 over 32 bytes at a time
// (fs/ext4/hash.c).
func nameHash(seed [4]uint32, name string) uint32 {
	buf := [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}
	if seed != ([4]uint32{}) {
		buf = seed
	}
	for rest := name; len(rest) > 0; rest = rest[min(32, len(rest)):] {
		pad := uint32(len(rest)) & 0xff
		pad |= pad << 8
		pad |= pad << 16
		var in [8]uint32
		for i := range in {
			in[i] = pad
			for j := 4 * i; j < min(4*i+4, len(rest)); j++ {
				in[i] = in[i]<<8 + uint32(rest[j])
			}
		}
		halfMD4Round(&buf, &in)
	}
	h := buf[1] &^ 1
	if h == 0xfffffffe {
		h = 0xfffffffc
	}
	return h
}

func halfMD4Round(buf *[4]uint32, in *[8]uint32) {
	v := *buf
	for _, round := range []struct {
		f     func(x, y, z uint32) uint32
		k     uint32
		order [8]int
		turn  [4]int
	}{
		{func(x, y, z uint32) uint32 { return z ^ x&(y^z) }, 0, [8]int{0, 1, 2, 3, 4, 5, 6, 7}, [4]int{3, 7, 11, 19}},
		{func(x, y, z uint32) uint32 { return x&y + (x^y)&z }, 0x5a827999, [8]int{1, 3, 5, 7, 0, 2, 4, 6}, [4]int{3, 5, 9, 13}},
		{func(x, y, z uint32) uint32 { return x ^ y ^ z }, 0x6ed9eba1, [8]int{3, 7, 2, 6, 1, 5, 0, 4}, [4]int{3, 9, 11, 15}},
	} {
		for i, n := range round.order {
			a := (4 - i%4) % 4 // a, d, c, b
			v[a] = bits.RotateLeft32(v[a]+round.f(v[(a+1)%4], v[(a+2)%4], v[(a+3)%4])+in[n]+round.k, round.turn[i%4])
		}
	}
	for i := range buf {
		buf[i] += v[i]
	}
}
