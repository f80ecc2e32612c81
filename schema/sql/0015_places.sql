-- A place is one storage in use; that of a retired one may hold another: a new disk, a bucket again.
ALTER TABLE storage DROP CONSTRAINT storage_interface_root_config_key;
CREATE UNIQUE INDEX storage_place ON storage (interface, root, config) WHERE mode <> 'retired';
